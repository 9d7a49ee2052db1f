"""`conformance`: does an OpenAI-compatible endpoint serve V4 as its users expect?"""

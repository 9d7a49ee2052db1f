"""The preflight: facts of every host, judged on the one that deploys.

A host gathers and judges nothing (`gathering`, `host`); what it found (`facts`) is judged by one
module for each area: `software`, `devices`, `network`, `host_limits`, `storage`, `operators`.
"""

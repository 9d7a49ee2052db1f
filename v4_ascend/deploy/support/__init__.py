"""A support bundle: what others need to help, without secrets and addresses."""

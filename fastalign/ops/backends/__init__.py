"""A folder for each backend, in it a file for each op: ``<backend>/<op>.py``, found by ``dispatch``."""

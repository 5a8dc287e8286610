"""A page in the browser: ``lsync web``. Needs the extra ``web``."""

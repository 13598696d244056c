"""One short module for each framework whose contract needs more than ``model(**batch).loss``."""

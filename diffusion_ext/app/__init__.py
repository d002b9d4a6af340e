"""The command line, and what only it shows: pictures, recognition, the report of info."""

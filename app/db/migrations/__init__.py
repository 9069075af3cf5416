"""The schema's history, applied by `app.db.migrate`. Files are never changed after a release, only added."""

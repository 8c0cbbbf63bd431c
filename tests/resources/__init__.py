"""What knowstore and its stores take of the machine when much is put in, apart from the models.

    python -m tests.resources.memory --megabytes 300           peak memory while a file of that size is ingested
    python -m tests.resources.memory --megabytes 300 --plan    the same for `ingest --dry-run`

The models are stand-ins that make random vectors and experts of the default models' sizes.
"""

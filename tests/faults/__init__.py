"""Fault injection: a store's process is killed, its disk fails, many write and read it at once.

    python -m tests.faults --kills 1000 --seed 0    random kills, half of them within a call that changes a file
    python -m tests.faults --steps 20               kills before every step of every command, 20 times each
    python -m tests.faults --calls 1                kills half-way through every call that changes a file; with 10,
                                                    through each tenth
    python -m tests.faults --disk 1                 every call that changes a file fails, once (EIO) or with all that
                                                    follow (ENOSPC, EROFS); with 10, each tenth call
    python -m tests.faults --soak 600               8 readers and 3 writers for so many seconds

With --postgresql catalogs are in a PostgreSQL server of its own, in SQLite files without.
Each prints a table and exits 1 when anything was lost, left behind or seen torn, or when nothing was tried.
`--commands` chooses among the commands, `--jobs` says how many processes make trials. Models are random and tiny,
everything else is real; after a kill another process compares catalog, passages and experts row by row, runs the
command again, and compares once more.

The programs of a trial are forked from one that has imported everything; `failing_io.c`, compiled when there is a C
compiler and preloaded, is what makes calls fail or end the process half-way.
"""

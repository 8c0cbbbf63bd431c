#!/bin/sh
# The store's life in a few commands: ingest, ask, remove, roll back, verify. `make demo` runs it in .venv.
set -eu
cd "$(dirname "$0")/.."

say() {
    printf '\n# %s\n' "$*"
}

run() {
    printf '\n$ knowstore'
    for word in "$@"; do
        case $word in *[!a-zA-Z0-9_./=-]*) printf ' "%s"' "$word" ;; *) printf ' %s' "$word" ;; esac
    done
    printf '\n'
    knowstore "$@"
}

say "Every passage of 14 files becomes an expert. The first time, the language model is converted as well."
run ingest examples/corpus --note "the example corpus"
run ingest examples/corpus

say "The question alone is in the prompt; what the passages say comes in through the mounted experts."
run ask "Who was the last keeper of Kirrin Point lighthouse?" --explain --candidates 8
run ask "What colour is Tarvan slate?"
run ask "Where was Lidia Brandt born?"

say "For comparison: the same model reads the passages in its prompt."
run ask "Who was the last keeper of Kirrin Point lighthouse?" --mode rag

say "Knowledge is taken out and put back without any training."
museum=$(knowstore --quiet list --source "$PWD/examples/corpus/museum.pdf")
run show "$museum"
run ask "How many silver coins are in the Garva hoard?"
run remove "$museum" --yes --note "the museum has closed"
run ask "How many silver coins are in the Garva hoard?"
run rollback 2
run ask "How many silver coins are in the Garva hoard?"
run batches
run stats
run verify

say "How good the answers are: no expert, the static one, another passage's, and the right passage's."
run bench controls --data examples/questions.jsonl --limit 20

"""A knowledge store from Python: add, ask, look behind the answer, take back.

Run it with `python examples/quickstart.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from knowstore import Filters, KnowledgeStore, ModelConfig, Passage

CORPUS = Path(__file__).parent / "corpus"


def main(folder: Path, models: ModelConfig | None = None) -> None:
    """Make a store in `folder` and use it; `models` are the defaults when None."""
    with KnowledgeStore.open(folder, models=models) as store:
        report = store.ingest([str(CORPUS)], note="the example corpus")
        print(f"{report.passages_added} passages in edit batch {report.batch_id}, {report.seconds:.0f} s")
        print(store.weights_note())

        # The question alone is in the prompt; experts carry what the passages say.
        answer = store.ask("Where was Lidia Brandt born?")
        print(f"{answer.question} {answer.text}")
        for expert in answer.experts:
            print(f"  weight {expert.weight:.2f}, edit batch {expert.batch_id}: {expert.title}")

        # Only passages of one file may be found.
        people = Filters(source=str(CORPUS.resolve() / "people.jsonl"))
        for hit in store.retrieve("Who plays the cello?", filters=people)[:3]:
            print(f"  score {hit.score:.2f}: {hit.title}")

        # An edit batch is added, used, and taken back.
        batch = store.add([Passage(title="Tarvan radio", text="Radio Tarvan broadcasts on 97.4 megahertz.")])
        print(store.ask("On which frequency does Radio Tarvan broadcast?").text)
        undone = store.rollback(batch.id)
        print(f"edit batch {undone.batch_id} removed {undone.removed} passage")

        # The frozen model itself, with experts on until the block ends.
        with store.mount("Where was Lidia Brandt born?") as llm:
            print(f"{llm.width} wide, {sum(p.numel() for p in llm.model.parameters()):,} parameters, all frozen")

        print(store.verify())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder) / "store")

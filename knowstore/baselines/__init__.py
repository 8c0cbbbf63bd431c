"""Other ways to teach a frozen LLM, behind one small interface, for comparison: RAG, LoRA, MEMIT, MEND and MALMEN; and
edit sets."""

from knowstore.baselines.choice import METHODS, Resources, make_method, usable_methods
from knowstore.baselines.edits import Edit, Edited, EditProbe, EditQuestion, EditRow, Method, Served, TaughtFact, Teach
from knowstore.baselines.editsets import draw_edits, load_edits

__all__ = [
    "METHODS",
    "Edit",
    "EditProbe",
    "EditQuestion",
    "EditRow",
    "Edited",
    "Method",
    "Resources",
    "Served",
    "TaughtFact",
    "Teach",
    "draw_edits",
    "load_edits",
    "make_method",
    "usable_methods",
]

"""The judge of criteria: the oracle, and how well each criterion agrees with it."""

from secateurs.judging.agreement import Agreement, Correlation, agree, spearman
from secateurs.judging.comparing import Comparison, Judgement, compare, judge
from secateurs.judging.ledger import Entry, Ledger
from secateurs.judging.truth import ORACLES, Oracle, OracleKind, oracle, sample_units

__all__ = [
    "ORACLES",
    "Agreement",
    "Comparison",
    "Correlation",
    "Entry",
    "Judgement",
    "Ledger",
    "Oracle",
    "OracleKind",
    "agree",
    "compare",
    "judge",
    "oracle",
    "sample_units",
    "spearman",
]

"""The judge of criteria: the oracle, and how well each criterion agrees with it."""

from secateurs.judging.ledger import Entry, Ledger
from secateurs.judging.oracle import ORACLES, Oracle, OracleKind, oracle, sample_units

__all__ = ["ORACLES", "Entry", "Ledger", "Oracle", "OracleKind", "oracle", "sample_units"]

"""How a coefficient is taken through a rule: the table of pullbacks, the tape, the ledger."""

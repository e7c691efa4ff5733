"""The contract of a stage: what makes a command resumable, atomic and auditable. See `contract.runner`."""

"""Rankings and pairs as data: ranks, agreement, soft targets, and the formats in which rankings are written."""

"""What people read: figures, leaderboard, the paper's tables, pages, model card, bits, inspection, lineage."""

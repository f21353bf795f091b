"""What every task shares: steps in the workspace, retries, progress, GPU slots, locks, worker processes."""

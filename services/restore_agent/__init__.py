"""The restore agent: keeps the target's port, restores servers on its node, and lets them run or clears them away."""

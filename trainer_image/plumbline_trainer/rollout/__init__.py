"""Rollouts: answers sampled from a policy, behind one interface."""

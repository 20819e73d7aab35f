"""Runs a range of transformer blocks on paged memory."""

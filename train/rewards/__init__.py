"""Rewards of answers, pure functions of what was asked, wanted and said."""

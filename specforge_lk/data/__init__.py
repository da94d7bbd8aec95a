"""Data that drafts are trained and measured on.

Prompts become responses of the target (`sample_local`, `sample_server`), responses become captured
features (`capture`). `released` reads what others have sampled.
"""

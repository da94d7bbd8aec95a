"""The drafts: `table` has a row for each, whoever trains it.

MEDUSA, the MLP speculator and MTP are architectures that SpecForge lacks. All three read the
target's last hidden state and propose a chain. They share one training model (`training`), one base
class (`model`) and one form of registration (`algorithms`); each brings its module and its config.
Registering them imports neither torch nor transformers.
"""

"""Every user-facing setting, as frozen keyword-only dataclasses, one module a command or a use.

Help text lives in the field metadata and nowhere else. Nothing here imports torch or transformers; how YAML and flags
become these objects is in `qscope_trl.parsing`.
"""

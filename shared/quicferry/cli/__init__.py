"""The ``quicferry`` command: one small module a group of commands, loaded when used."""

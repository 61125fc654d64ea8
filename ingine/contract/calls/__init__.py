"""One typed call for each Lua script in `ingine/contract/scripts`.

A function here takes named arguments and returns a `ScriptCall`: KEYS and ARGV in the script's order, and the
reader of its reply. Nothing is sent: `ingine.connect.scripts` and `ingine.connect.script_pipeline` run calls.
Functions are named like their scripts, except where a script has two uses.
"""

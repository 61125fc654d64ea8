"""What an output may look like: from a schema, regular expression or grammar to masks of allowed tokens."""

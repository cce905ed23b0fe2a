"""The command line: groups of options, what makes a verb of a declaration, and the verbs that make stages."""

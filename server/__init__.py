"""The label server: one label store, shared by a whole cluster over HTTP."""

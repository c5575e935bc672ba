//! Steps that make the web page a model is shipped in.

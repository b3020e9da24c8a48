//! Where the sent coordinates are: gaps between them in Rice codes, in blocks that stand alone.

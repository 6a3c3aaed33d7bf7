"""What tells two corpora, catalogs or snapshots apart?"""

"""Many recipes on one model: what each costs and loses, which of them no other dominates, and the tables that say so.

A board is a record ready for JSON, made of one `Entry` per recipe; tables and figures are made of the board alone.
Everything that is compared is compared at *stored* bits; the bits that a method claims are shown beside them.
"""

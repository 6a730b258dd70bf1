"""How far apart a network and its fixed-point form can be for any input in a box (QEBVerif): proofs, and searches."""

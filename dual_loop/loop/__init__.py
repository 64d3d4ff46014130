"""The loop itself: step 1 captions a mask, step 2 segments the caption, step 3 compares the two masks."""

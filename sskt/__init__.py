"""Labels of frozen teachers, computed once and streamed into every training (SSKT)."""

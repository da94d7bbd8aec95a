"""Will I serve what I train? What differs between a draft's training and its serving, in τ."""

"""Operations on a paged KV cache: each with a plain-torch reference, and faster twins where they pay."""

"""Allocation: which sparsity pattern each linear gets."""

from nnprune.patterns import PatternError, SparsityPattern


class Uniform:
    """The same pattern for every linear."""

    def plan(self, pattern: SparsityPattern, shapes: dict[str, tuple[int, int]]) -> dict[str, SparsityPattern]:
        """Linear name -> pattern, from linear name -> (O, I). Raises ValueError when a width does not suit the pattern."""
        if not shapes:
            raise ValueError("the decoder layers hold no linear that could be pruned")
        for name, (_, in_features) in shapes.items():
            try:
                pattern.check_width(in_features)
            except PatternError as error:
                raise ValueError(
                    f"sparsity={pattern}: {name} {error}; choose another N:M or an unstructured sparsity"
                ) from None
        return dict.fromkeys(shapes, pattern)

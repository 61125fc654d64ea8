"""Makes triton's interpreter work with a NumPy that is newer than triton."""

from triton.runtime import interpreter


def accept_numpy_2_4() -> None:
    """Allow scalars of a kernel as the bounds of a loop.

    Triton 3.6 holds them as arrays of one element and calls `int` on these, which NumPy 2.4 refuses.
    """
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index

"""What triton's interpreter needs to run with a NumPy that is newer than it."""

from triton.runtime import interpreter


def accept_numpy_2_4() -> None:
    """Let a loop's bounds be scalars of a kernel.

    Triton 3.6 holds these as arrays of one element and calls `int` on them, which NumPy 2.4 refuses.
    """
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index

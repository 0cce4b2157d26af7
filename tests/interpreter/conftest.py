"""What Triton 3.6's interpreter lacks beside NumPy 2.4, where an array of one element is no scalar any more: bounds of `range`."""

import contextlib

with contextlib.suppress(ImportError):
    import triton
    from triton.runtime import interpreter

    if triton.__version__.startswith("3.6."):
        patch = interpreter._patch_lang_tensor

        def patched(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patched

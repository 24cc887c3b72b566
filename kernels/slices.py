"""The width of the slices in which the gather kernels walk over d_model.

A gather kernel reads a row of its table (w, or y in scatter_outer) for every active latent: 51 GB
at N = 32,768, k = 192, d_model = 4096 in bf16, 17 ms of an H100's memory at 3 TB/s, and its L2 has
about twice the bandwidth. So all programs work on one slice of d_model at a time, and the slice of
the table, rows * width * itemsize, stays in the L2: 32 MiB of 50 (A100: 40, GeForce 4090: 72).
"""

L2_BYTES = 32 * 2**20
# A row's part of a slice is then 128 bytes, a cache line, to 1 KiB. Wider gains nothing.
WIDTHS = (512, 256, 128, 64)
TILE = 4096  # values of the table in flight in a program of NUM_WARPS: 32 a thread
NUM_WARPS = 4


def slice_width(rows: int, d_model: int, itemsize: int) -> int:
    """The widest slice of a (rows, d_model) table that stays in the L2. Does not depend on N."""
    for width in WIDTHS:
        if width < 2 * d_model and rows * width * itemsize <= L2_BYTES:
            return width
    return WIDTHS[-1]

"""The host build's machine: it computes as a GPU does, and names what a GPU would leave undefined."""

from typing import Any

import numpy as np
import pytest

from refengine.cuda.runtime.arguments import Arguments
from refengine.cuda.runtime.host import HostModule
from refengine.cuda.runtime.source import Struct, source_of
from refengine.errors import KernelError
from tests.kernels.runner import Kernels

KERNELS = """
extern "C" __global__ void add_f32(const float* __restrict__ a, const float* b, float* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = a[i] + b[i];
}

extern "C" __global__ void coordinates(int* out) {
  int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

extern "C" __global__ void reverse_in_shared(const int* in, int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

extern "C" __global__ void race(const int* in, int* out) {  // the barrier is missing
  __shared__ int values[64];
  values[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = values[63 - threadIdx.x];
}

extern "C" __global__ void warp_sum(const float* in, float* out, int* votes) {
  float x = in[threadIdx.x];
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = x;
  unsigned odd = __ballot_sync(0xffffffffu, threadIdx.x & 1);
  if (threadIdx.x == 0) votes[0] = odd == 0xaaaaaaaau;
  if (threadIdx.x < 16) {
    int sum = __reduce_add_sync(0xffffu, (int)threadIdx.x);
    int above = __shfl_down_sync(0xffffu, (int)threadIdx.x, 1);
    votes[1 + threadIdx.x] = sum * 100 + above;
  }
}

extern "C" __global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 7) __syncthreads();
  out[threadIdx.x] = 1;
}

extern "C" __global__ void two_barriers(int* out) {
  if (threadIdx.x < 7)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

extern "C" __global__ void lonely_lane(int* out) {
  if (threadIdx.x == 3) out[0] = __shfl_sync(0xffffffffu, 1, 0);
}

extern "C" __global__ void not_in_mask(int* out) { out[threadIdx.x] = __shfl_sync(0x1u, 1, 0); }

extern "C" __global__ void wide_read(const float* in, float* out, int first) {
  hostcuda::require_alignment(in + first, sizeof(float4));
  float4 four = *reinterpret_cast<const float4*>(in + first);
  out[0] = four.x + four.y + four.z + four.w;
}

extern "C" __global__ void writes_input(const float* in) { const_cast<float*>(in)[0] = 1; }

extern "C" __global__ void shared_too_far(float* out, int i) {
  float* values = static_cast<float*>(hostcuda::dynamic_shared());
  values[i] = 1;
  out[0] = values[i];
}

extern "C" __global__ void nothing_written(float* out) {
  __shared__ float values[4];
  if (threadIdx.x == 0) values[0] = 1;
  __syncthreads();
  out[0] = values[threadIdx.x + 1];
}

extern "C" __global__ void arithmetic(const int* in, int* out) {
  out[0] = __dp4a(in[0], in[1], 5);
  out[1] = __byte_perm(0x33221100, 0x77665544, 0x7410);
  out[2] = __popc(in[0]) * 100 + __clz(in[1]);
  atomicAdd(&out[3], in[0]);
  out[4] = __float_as_int(fmaf(0.1f, 10.0f, -1.0f));
}
"""


@pytest.fixture(scope="module", params=["checked", "plain"])
def module(request: pytest.FixtureRequest) -> HostModule:
    return HostModule(source_of("machine", ("machine.cu", KERNELS)), request.param)


@pytest.fixture(scope="module")
def checked() -> HostModule:
    return HostModule(source_of("machine", ("machine.cu", KERNELS)), "checked")


def test_attributes_of_the_compiler_keep_their_names() -> None:
    """libstdc++ 13 says `__attribute__((__noinline__))`, which a macro of that name, as CUDA has, would break."""
    text = """
inline __attribute__((__noinline__)) int twice(int x) { return 2 * x; }
extern "C" __global__ void twice_all(const int* in, int* out) { out[threadIdx.x] = twice(in[threadIdx.x]); }
"""
    module = HostModule(source_of("attributes", ("attributes.cu", text)), "plain")
    out = np.zeros(4, np.int32)
    module.launch("twice_all", (1,), (4,), [np.arange(4, dtype=np.int32), out])
    np.testing.assert_array_equal(out, [0, 2, 4, 6])


def test_every_thread_of_every_block_runs_once(module: HostModule) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 1000)).astype(np.float32)
    out = np.zeros(1000, np.float32)
    module.launch("add_f32", (4,), (256,), [a, b, out, np.int32(1000)])
    np.testing.assert_array_equal(out, a + b)
    places = np.zeros(2 * 3 * 4 * 5 * 6 * 7, np.int32)
    module.launch("coordinates", (2, 3, 4), (5, 6, 7), [places])
    expected = (np.arange(24)[:, None] * 1000 + np.arange(210)).ravel()
    np.testing.assert_array_equal(places, expected)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_barrier_orders_and_its_absence_shows(order: int, module: HostModule) -> None:
    given, out = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    module.launch("reverse_in_shared", (1,), (64,), [given, out], order=order)
    np.testing.assert_array_equal(out, given[::-1])
    if module.mode == "checked":
        with pytest.raises(KernelError, match="reads uninitialised shared memory"):
            module.launch("race", (1,), (64,), [given, out], order=order)
    else:
        module.launch("race", (1,), (64,), [given, out], order=order)
        assert not np.array_equal(out, given[::-1])


@pytest.mark.parametrize("order", [0, 1, 5])
def test_warp_operations(order: int, module: HostModule) -> None:
    given = np.random.default_rng(2).standard_normal(64).astype(np.float32)
    out, votes = np.zeros(2, np.float32), np.zeros(17, np.int32)
    module.launch("warp_sum", (1,), (64,), [given, out, votes], order=order)
    lanes = given.reshape(2, 32)
    for offset in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[:, np.arange(32) ^ offset]
    np.testing.assert_array_equal(out, lanes[:, 0])
    assert votes[0] == 1
    np.testing.assert_array_equal(votes[1:], 12000 + np.minimum(np.arange(16) + 1, 15))


def test_integer_and_bit_operations(module: HostModule) -> None:
    out = np.zeros(5, np.int32)
    module.launch("arithmetic", (1,), (1,), [np.array([0x0102FF7F, 0x01010102], np.int32), out])
    assert out[0] == 1 * 1 + 2 * 1 + -1 * 1 + 127 * 2 + 5
    assert out[1] == 0x77441100 - (1 << 32) if out[1] < 0 else 0x77441100
    assert out[2] == bin(0x0102FF7F).count("1") * 100 + 7
    assert out[3] == 0x0102FF7F
    assert out[4:].view(np.float32)[0] == np.float32(0.1) * np.float64(10) - 1  # one rounding


FAULTS: dict[str, tuple[int, list[Any], int, str]] = {
    "divergent_barrier": (32, [np.zeros(32, np.int32)], 0,
                          r"block \(0, 0, 0\): divergent barrier: thread 0 waits at __syncthreads of line \d+, "
                          r"thread 31 has ended"),
    "two_barriers": (32, [np.zeros(32, np.int32)], 0, r"divergent barrier: thread 0 .* thread 31 is at line"),
    "lonely_lane": (32, [np.zeros(1, np.int32)], 0, r"names lane \d+, which has ended|divergent warp operation"),
    "not_in_mask": (32, [np.zeros(32, np.int32)], 0, r"thread 1: line \d+: the mask 0x00000001 leaves out the calling"),
}  # fmt: skip
CHECKED: dict[str, tuple[int, list[Any], int, str]] = {
    "add_f32": (256, [np.zeros(256, np.float32), np.zeros(200, np.float32), np.zeros(256, np.float32), np.int32(256)],
                0, r"add_f32: block \(0, 0, 0\) thread 200: out of bounds: reads 4 bytes, 0 past the end of 'b' "
                   r"\(800 bytes\)"),
    "wide_read": (1, [np.zeros(16, np.float32), np.zeros(1, np.float32), np.int32(1)], 0,
                  "misaligned: an access of 16 bytes"),
    "writes_input": (1, [np.zeros(4, np.float32)], 0, "writes to 'in', which is read-only"),
    "shared_too_far": (1, [np.zeros(1, np.float32), np.int32(4)], 16,
                       "writes 4 bytes at byte 16 of shared memory, which has 16"),
    "nothing_written": (2, [np.zeros(1, np.float32)], 0, "reads uninitialised shared memory: 4 bytes at byte"),
}  # fmt: skip


@pytest.mark.parametrize("kernel", FAULTS)
def test_what_hangs_on_a_gpu_is_named(kernel: str, module: HostModule) -> None:
    threads, arguments, shared, message = FAULTS[kernel]
    with pytest.raises(KernelError, match=message):
        module.launch(kernel, (1,), (threads,), arguments, shared)
    # And the machine is usable afterwards.
    given, out = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    module.launch("reverse_in_shared", (1,), (64,), [given, out])
    np.testing.assert_array_equal(out, given[::-1])


@pytest.mark.parametrize("kernel", CHECKED)
def test_wrong_accesses_are_named(kernel: str, checked: HostModule) -> None:
    threads, arguments, shared, message = CHECKED[kernel]
    with pytest.raises(KernelError, match=message):
        checked.launch(kernel, (1,), (threads,), arguments, shared)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([np.zeros(4, np.float32)] * 3, "takes 4 arguments, 3 were given"),
        ([np.zeros(4), *[np.zeros(4, np.float32)] * 2, np.int32(4)], "a must be float32, found float64"),
        ([*[np.zeros(4, np.float32)] * 3, "4"], "n must be a number: '4'"),
        ([*[np.zeros(4, np.float32)] * 3, 1 << 31], "n is 2147483648, out of range for int"),
        ([*[np.zeros(4, np.float32)] * 3, -1 - (1 << 31)], "n is -2147483649, out of range for int"),
        ([*[np.zeros(4, np.float32)] * 3, 4.0], r"n must be a whole number, found 4\.0"),
        ([*[np.zeros(4, np.float32)] * 3, float("nan")], "n must be a whole number, found nan"),
        ([*[np.zeros(4, np.float32)] * 3, np.int64(4)], "n must be int32, found int64"),
        ([np.float32(1), *[np.zeros(4, np.float32)] * 2, np.int32(4)], "a must be an array"),
        ([np.zeros(8, np.float32)[::2], *[np.zeros(4, np.float32)] * 2, np.int32(4)], "a must be contiguous"),
    ],
)
def test_arguments_are_checked_before_a_launch(arguments: list[Any], message: str, checked: HostModule) -> None:
    with pytest.raises(KernelError, match=message):
        checked.launch("add_f32", (1,), (4,), arguments)


NUMBERS = """
extern "C" __global__ void numbers(int i, long long l, unsigned u, float f, double d, int last, double* out) {
  out[0] = i, out[1] = l, out[2] = u, out[3] = f, out[4] = d, out[5] = last;
}
"""


def test_numbers_arrive_as_the_c_types_of_the_parameters(place: str) -> None:
    kernels = Kernels(source_of("numbers", ("numbers.cu", NUMBERS)), place)

    def arrived(*given: Any) -> list[float]:
        out = np.zeros(6)
        kernels.launch("numbers", (1,), (1,), [*given, out])
        return [float(value) for value in out]

    limits = [-(1 << 31), -(1 << 53), (1 << 32) - 1, 0.1, 0.1, (1 << 31) - 1]
    assert arrived(*limits) == [*limits[:3], float(np.float32(0.1)), *limits[4:]]
    assert arrived(True, False, True, 3, True, False) == [1, 0, 1, 3, 1, 0]
    assert arrived(0, 0, 0, float("inf"), 1e300, 0)[3:5] == [np.inf, 1e300]
    typed: list[Any] = [np.int32(-5), np.int64(1 << 40), np.uint32(7), np.float32(0.1), np.float64(0.1), np.int32(6)]
    assert arrived(*typed) == [float(value) for value in typed]


def test_numbers_out_of_range_are_refused() -> None:
    arguments = Arguments(source_of("numbers", ("numbers.cu", NUMBERS)), "numbers")
    out = np.zeros(6)
    fine = [0, 0, 0, 0.0, 0.0, 0]
    wrong = {"i": (0, 1 << 31), "u": (2, -1), "l": (1, 1 << 63), "f": (3, 1e39)}
    for name, (place, value) in wrong.items():
        given = [*fine[:place], value, *fine[place + 1 :], out]
        with pytest.raises(KernelError, match=f"numbers: {name} is .*, out of range for "):
            arguments.write(given)


STRUCT = """
struct Pair {
  const float* a;
  const float* b;
};
extern "C" __global__ void add_pair(Pair in, float* out, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = in.a[i] + (in.b ? in.b[i] : 0.0f);
}
"""


def test_structs_of_pointers_are_one_argument_and_python_numbers_are_converted() -> None:
    module = HostModule(source_of("pairs", ("pairs.cu", STRUCT)))
    a, b, out = np.arange(5, dtype=np.float32), np.ones(5, np.float32), np.zeros(5, np.float32)
    module.launch("add_pair", (1,), (2,), [Struct(a, b), out, 5])
    np.testing.assert_array_equal(out, a + 1)
    module.launch("add_pair", (1,), (2,), [Struct(a, None), out, 5])
    np.testing.assert_array_equal(out, a)
    with pytest.raises(KernelError, match="add_pair: in must be a Struct of 2 arrays"):
        module.launch("add_pair", (1,), (2,), [a, out, 5])
    with pytest.raises(KernelError, match=r"in\.b must be float32, found float64"):
        module.launch("add_pair", (1,), (2,), [Struct(a, b.astype(np.float64)), out, 5])
    with pytest.raises(KernelError, match="reads 4 bytes"):
        module.launch("add_pair", (1,), (2,), [Struct(a[:3], b), out, 5])


def test_an_unknown_kernel_or_type_and_a_compile_error_are_named(checked: HostModule) -> None:
    with pytest.raises(KernelError, match="has no kernel 'nothing'; it has add_f32"):
        checked.launch("nothing", (1,), (1,), [])
    with pytest.raises(KernelError, match=r"parameter 'Matrix m' has a type that launches do not support"):
        source_of("m", ("m.cu", 'extern "C" __global__ void k(Matrix m) {}'))
    wrong = '\nextern "C" __global__ void k(int n) { x; }'
    broken = source_of("broken", ("head.cuh", "// one\n"), ("broken.cu", wrong))
    with pytest.raises(KernelError, match=r"broken\.cu:2:"):
        HostModule(broken)

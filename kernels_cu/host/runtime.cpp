// The machine under hostcuda.h: fibres for the threads of a block, barriers, and the checks of every memory access.
// Compiled without instrumentation, once for every kernel file, into the same library.

#include "hostcuda.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <link.h>
#include <string>
#include <sys/mman.h>
#include <vector>
#if !defined(__x86_64__) || defined(HOSTCUDA_UCONTEXT)
#define USES_UCONTEXT 1
#include <ucontext.h>
#endif

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

// Start and end of the section that holds static shared memory; absent where no kernel has any.
extern "C" char __start_hostcuda_shared[] __attribute__((weak));
extern "C" char __stop_hostcuda_shared[] __attribute__((weak));

namespace hostcuda {

Thread* running = nullptr;

namespace {

// Not a power of two: the tops of all stacks would share one set of the processor's caches.
constexpr std::size_t STACK_BYTES = (64 << 10) + 320;
constexpr unsigned MAX_THREADS = 1024;
constexpr std::size_t MAX_SHARED = 228 << 10;

enum class State { ready, at_barrier, in_warp_operation, done };

#ifdef USES_UCONTEXT
using Context = ucontext_t;
void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
#else
// A context is a stack pointer; the callee-saved registers lie on the stack.
using Context = void*;
extern "C" void hostcuda_switch(void** from, void* to);
asm(R"(
.text
.globl hostcuda_switch
.hidden hostcuda_switch
.type hostcuda_switch, @function
hostcuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void switch_to(Context& from, Context& to) { hostcuda_switch(&from, to); }
#endif

struct Fibre {
  Thread thread;
  Context context;
  State state;
  int line;  // of the barrier or operation it waits at
  WarpOperation operation;
  unsigned mask;
  Lane lane;
};

struct Buffer {
  const char* name;
  std::uintptr_t start;
  std::size_t size;
  int writable;
};

struct Region {
  std::uintptr_t start = 0, end = 0;
  bool holds(std::uintptr_t address, std::size_t size) const { return address >= start && address + size <= end; }
};

char* stacks = nullptr;
Fibre* fibres = nullptr;
Region fibre_memory, image, static_shared, shared_region;
alignas(256) char dynamic_memory[MAX_SHARED];
std::size_t dynamic_bytes = 0;
std::vector<bool> static_written, dynamic_written;

const Buffer* buffers = nullptr;
int n_buffers = 0;
const char* kernel_name = "";
void (*kernel_call)(void**) = nullptr;
void** kernel_arguments = nullptr;

Context scheduler;
Fibre* current = nullptr;
unsigned n_threads = 0;
bool failed = false;
char message[512];
bool checking = false;

void yield() {
  Fibre* self = current;
  current = nullptr;
  switch_to(self->context, scheduler);
}

void fibre_main() {
  kernel_call(kernel_arguments);
  current->state = State::done;
  yield();
  std::abort();  // a thread that has ended is not resumed
}

void prepare(Fibre& fibre, unsigned index) {
  char* top = stacks + (index + 1) * STACK_BYTES;
#ifdef USES_UCONTEXT
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = top - STACK_BYTES;
  fibre.context.uc_stack.ss_size = STACK_BYTES;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, fibre_main, 0);
#else
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;  // keeps the stack aligned as after a call
  *--stack = reinterpret_cast<void*>(fibre_main);
  for (int i = 0; i < 6; i++) *--stack = nullptr;
  fibre.context = stack;
#endif
}

// Lines, not addresses, tell barriers apart: two at one line are one.
void describe_stuck() {
  const Fibre *waits = nullptr, *other = nullptr;
  for (unsigned i = 0; i < n_threads; i++) {
    const Fibre& fibre = fibres[i];
    if (fibre.state == State::in_warp_operation) {
      std::snprintf(message, sizeof message,
                    "%s: block (%u, %u, %u): divergent warp operation: thread %u waits at line %d for lanes 0x%08x, not "
                    "all of which come",
                    kernel_name, fibre.thread.block.x, fibre.thread.block.y, fibre.thread.block.z, fibre.thread.linear,
                    fibre.line, fibre.mask);
      return;
    }
    if (fibre.state == State::at_barrier && !waits) waits = &fibre;
  }
  for (unsigned i = 0; i < n_threads; i++)
    if (fibres[i].state != State::at_barrier || fibres[i].line != waits->line) other = &fibres[i];
  char what[64];
  if (other->state == State::done)
    std::snprintf(what, sizeof what, "has ended");
  else
    std::snprintf(what, sizeof what, "is at line %d", other->line);
  std::snprintf(message, sizeof message,
                "%s: block (%u, %u, %u): divergent barrier: thread %u waits at __syncthreads of line %d, thread %u %s",
                kernel_name, waits->thread.block.x, waits->thread.block.y, waits->thread.block.z, waits->thread.linear,
                waits->line, other->thread.linear, what);
}

// Runs threads in the given order until all have ended; false on an error.
bool run_block(const std::vector<unsigned>& order) {
  for (;;) {
    bool progress = false;
    unsigned n_done = 0, n_at_barrier = 0;
    for (unsigned index : order) {
      Fibre& fibre = fibres[index];
      if (fibre.state == State::ready) {
        progress = true;
        current = &fibre;
        running = &fibre.thread;
        switch_to(scheduler, fibre.context);
        if (failed) return false;
      }
    }
    if (progress) continue;
    bool one_line = true;
    int line = 0;
    for (unsigned i = 0; i < n_threads; i++) {
      n_done += fibres[i].state == State::done;
      if (fibres[i].state == State::at_barrier) {
        one_line = one_line && (!n_at_barrier || fibres[i].line == line);
        line = fibres[i].line;
        n_at_barrier++;
      }
    }
    if (n_done == n_threads) return true;
    if (n_at_barrier != n_threads || !one_line) {
      describe_stuck();
      return false;
    }
    for (unsigned i = 0; i < n_threads; i++) fibres[i].state = State::ready;
  }
}

int add_image(dl_phdr_info* info, std::size_t, void* wanted) {
  auto address = reinterpret_cast<std::uintptr_t>(wanted);
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& header = info->dlpi_phdr[i];
    std::uintptr_t start = info->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_LOAD && address >= start && address < start + header.p_memsz) {
      for (int k = 0; k < info->dlpi_phnum; k++)
        if (info->dlpi_phdr[k].p_type == PT_LOAD) {
          std::uintptr_t low = info->dlpi_addr + info->dlpi_phdr[k].p_vaddr;
          if (!image.end || low < image.start) image.start = low;
          image.end = std::max(image.end, low + info->dlpi_phdr[k].p_memsz);
        }
      return 1;
    }
  }
  return 0;
}

bool start_machine() {
  if (stacks) return true;
  std::size_t bytes = MAX_THREADS * STACK_BYTES + MAX_THREADS * sizeof(Fibre);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  madvise(memory, bytes, MADV_HUGEPAGE);  // a stack a thread: with small pages most switches miss the TLB
  stacks = static_cast<char*>(memory);
  fibres = reinterpret_cast<Fibre*>(stacks + MAX_THREADS * STACK_BYTES);
  auto start = reinterpret_cast<std::uintptr_t>(memory);
  fibre_memory = {start, start + bytes};
  dl_iterate_phdr(add_image, reinterpret_cast<void*>(&start_machine));
  static_shared = {reinterpret_cast<std::uintptr_t>(__start_hostcuda_shared),
                   reinterpret_cast<std::uintptr_t>(__stop_hostcuda_shared)};
  static_written.resize(static_shared.end - static_shared.start);
  auto dynamic = reinterpret_cast<std::uintptr_t>(dynamic_memory);
  shared_region = {dynamic, dynamic + MAX_SHARED};
  return true;
}

void check_shared(std::uintptr_t address, std::size_t size, bool write, std::vector<bool>& written, std::size_t limit,
                  std::uintptr_t start) {
  std::size_t offset = address - start;
  if (offset + size > limit)
    fail("%s %zu bytes at byte %zu of shared memory, which has %zu", write ? "writes" : "reads", size, offset, limit);
  for (std::size_t i = offset; i < offset + size; i++) {
    if (write)
      written[i] = true;
    else if (!written[i])
      fail("reads uninitialised shared memory: %zu bytes at byte %zu", size, offset);
  }
}

void check(const void* pointer, std::size_t size, bool write, std::size_t alignment) {
  if (!checking || !current) return;
  auto address = reinterpret_cast<std::uintptr_t>(pointer);
  const char* does = write ? "writes" : "reads";
  for (int i = 0; i < n_buffers; i++) {
    const Buffer& buffer = buffers[i];
    if (address >= buffer.start && address + size <= buffer.start + buffer.size) {
      if (write && !buffer.writable) fail("writes to '%s', which is read-only", buffer.name);
      if (address % alignment)
        fail("misaligned: %s %zu bytes at byte %zu of '%s'", does, size, std::size_t(address - buffer.start), buffer.name);
      return;
    }
  }
  if (shared_region.holds(address, size)) {
    if (address % alignment) fail("misaligned: %s %zu bytes of shared memory", does, size);
    return check_shared(address, size, write, dynamic_written, dynamic_bytes, shared_region.start);
  }
  if (static_shared.holds(address, size))
    return check_shared(address, size, write, static_written, static_written.size(), static_shared.start);
  if (fibre_memory.holds(address, size) || image.holds(address, size)) return;
  const Buffer* nearest = nullptr;
  std::ptrdiff_t distance = 0;
  for (int i = 0; i < n_buffers; i++) {
    const Buffer& buffer = buffers[i];
    std::ptrdiff_t off = address < buffer.start ? std::ptrdiff_t(address - buffer.start)
                                                : std::ptrdiff_t(address - buffer.start - buffer.size);
    if (!nearest || std::llabs(off) < std::llabs(distance)) nearest = &buffer, distance = off;
  }
  if (!nearest) fail("out of bounds: %s %zu bytes at %p, and no buffer was given", does, size, pointer);
  if (distance < 0)
    fail("out of bounds: %s %zu bytes, %td before the start of '%s' (%zu bytes)", does, size, -distance, nearest->name,
         nearest->size);
  fail("out of bounds: %s %zu bytes, %td past the end of '%s' (%zu bytes)", does, size, distance, nearest->name,
       nearest->size);
}

}  // namespace

void fail(const char* format, ...) {
  int n = std::snprintf(message, sizeof message, "%s: block (%u, %u, %u) thread %u: ", kernel_name, running->block.x,
                        running->block.y, running->block.z, running->linear);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message + n, sizeof message - n, format, arguments);
  va_end(arguments);
  failed = true;
  yield();  // the block is given up; nobody comes back here
  std::abort();
}

void block_barrier(int line) {
  current->state = State::at_barrier;
  current->line = line;
  yield();
}

void warp_operation(WarpOperation operation, unsigned mask, const void* in, void* out, int argument, int line) {
  Fibre& self = *current;
  if (!(mask >> self.thread.lane & 1)) fail("line %d: the mask 0x%08x leaves out the calling lane", line, mask);
  self.operation = operation;
  self.mask = mask;
  self.line = line;
  self.lane = {in, out, argument};
  self.state = State::in_warp_operation;
  unsigned base = self.thread.linear - self.thread.lane;
  Lane lanes[32];
  for (unsigned lane = 32; lane-- > 0;) {  // threads run forwards, so that the last one is missing the longest
    if (!(mask >> lane & 1)) continue;
    if (base + lane >= n_threads) fail("line %d: the mask 0x%08x names lane %u, which the block lacks", line, mask, lane);
    const Fibre& other = fibres[base + lane];
    if (other.state == State::done) fail("line %d: the mask 0x%08x names lane %u, which has ended", line, mask, lane);
    if (other.state != State::in_warp_operation || other.operation != operation || other.mask != mask ||
        other.line != line)
      return yield();  // the last one to come does the work
    lanes[lane] = other.lane;
  }
  operation(lanes, mask);
  for (unsigned lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) fibres[base + lane].state = State::ready;
}

void* dynamic_shared() { return dynamic_memory; }

void require_alignment(const void* pointer, std::size_t size) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % size)
    fail("misaligned: an access of %zu bytes at address %p", size, pointer);
}

}  // namespace hostcuda

using namespace hostcuda;

// Runs a grid. order: 0 runs the threads of a block forwards, 1 backwards, more shuffles them by this seed: a missing
// barrier shows. Returns null, or what went wrong.
extern "C" const char* hostcuda_launch(const char* name, void (*call)(void**), void** arguments, const unsigned* grid,
                                       const unsigned* block, std::size_t shared_bytes, const Buffer* given, int n_given,
                                       unsigned order, int check_memory) {
  n_threads = block[0] * block[1] * block[2];
  if (!start_machine()) return "no memory for the fibres";
  if (n_threads == 0 || n_threads > MAX_THREADS) return "a block has 1 to 1024 threads";
  if (shared_bytes > MAX_SHARED) return "more dynamic shared memory than 228 KiB";
  kernel_name = name, kernel_call = call, kernel_arguments = arguments;
  buffers = given, n_buffers = n_given, dynamic_bytes = shared_bytes, checking = check_memory != 0, failed = false;
  std::vector<unsigned> turns(n_threads);
  for (unsigned i = 0; i < n_threads; i++) turns[i] = order == 1 ? n_threads - 1 - i : i;
  std::uint64_t random = order;
  for (unsigned i = n_threads; order > 1 && i > 1; i--) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(turns[i - 1], turns[(random >> 33) % i]);
  }
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0]; x++) {
        std::fill(static_written.begin(), static_written.end(), false);
        dynamic_written.assign(shared_bytes, false);
        // What nothing has written is garbage on a GPU: a NaN here.
        std::memset(dynamic_memory, 0xff, shared_bytes);
        std::memset(reinterpret_cast<void*>(static_shared.start), 0xff, static_shared.end - static_shared.start);
        for (unsigned i = 0; i < n_threads; i++) {
          Fibre& fibre = fibres[i];
          fibre.thread = {{i % block[0], i / block[0] % block[1], i / (block[0] * block[1])},
                          {x, y, z},
                          {block[0], block[1], block[2]},
                          {grid[0], grid[1], grid[2]},
                          i,
                          i % 32};
          fibre.state = State::ready;
          prepare(fibre, i);
        }
        if (!run_block(turns)) return message;
      }
  return nullptr;
}

// What -fsanitize=thread calls.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESS(n)                                                        \
  void __tsan_read##n(void* p) { check(p, n, false, n); }                \
  void __tsan_write##n(void* p) { check(p, n, true, n); }                \
  void __tsan_unaligned_read##n(void* p) { check(p, n, false, 1); }      \
  void __tsan_unaligned_write##n(void* p) { check(p, n, true, 1); }      \
  void __tsan_volatile_read##n(void* p) { check(p, n, false, n); }       \
  void __tsan_volatile_write##n(void* p) { check(p, n, true, n); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, std::size_t n) { check(p, n, false, 1); }
void __tsan_write_range(void* p, std::size_t n) { check(p, n, true, 1); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

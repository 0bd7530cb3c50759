// The machine behind emulation.h: blocks one after another, a fiber for every thread.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation.h"

#if defined(__x86_64__)
// Saves the callee-saved registers and changes stacks: what swapcontext does, less its two system calls.
extern "C" void xeco_switch_stack(void** save, void* load);
asm(R"(
.text
.globl xeco_switch_stack
.type xeco_switch_stack, @function
xeco_switch_stack:
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
.size xeco_switch_stack, .-xeco_switch_stack
)");
#else
#include <ucontext.h>
#endif

namespace xeco::gpu::machine {
namespace {

constexpr size_t kStackBytes = 128 * 1024, kFence = 1024;
constexpr char kFenceByte = 0x5a;
constexpr int kUntilItWaits = 1 << 30;

struct Copy {
  void* to;
  const void* from;
  int bytes;  // the others of 16 become zeros
};

struct Fiber {
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool done = false;
  int64_t barriers = 0;                 // that it has come to
  const uint64_t* waits_for = nullptr;  // ready when it is no longer `seen`
  uint64_t seen = 0;
  std::vector<Copy> open;                 // copies of the group that is being made
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

struct Meeting {
  Together together = nullptr;
  std::vector<void*> lanes = std::vector<void*>(kLanes);
  int arrived = 0;
  uint64_t number = 0;
};

std::vector<Fiber> fibers;
std::vector<Meeting> warps;
std::vector<char> memory;
size_t shared_size = 0;
int num_threads = 0, current = 0, at_barrier = 0;
uint64_t barrier_number = 0;
int64_t current_block = 0;
bool trapped = false;
const std::function<void()>* entry = nullptr;
std::mt19937 order;  // of warps and of their threads
uint32_t order_seed = 0;
int64_t left_out = -1;             // see machine::set_schedule
std::vector<int64_t> barriers_of;  // each launch since then
#if defined(__x86_64__)
void* scheduler = nullptr;
#else
ucontext_t scheduler;
#endif

void leave() {
#if defined(__x86_64__)
  xeco_switch_stack(&fibers[current].stack_pointer, scheduler);
#else
  swapcontext(&fibers[current].context, &scheduler);
#endif
}

void enter(int number) {
  current = number;
#if defined(__x86_64__)
  xeco_switch_stack(&scheduler, fibers[number].stack_pointer);
#else
  swapcontext(&scheduler, &fibers[number].context);
#endif
}

[[noreturn]] void body() {
  (*entry)();
  fibers[current].done = true;
  leave();
  std::abort();
}

void start(Fiber& fiber) {
  fiber.done = false, fiber.waits_for = nullptr, fiber.barriers = 0;
  fiber.open.clear(), fiber.groups.clear();
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.data() + kStackBytes) & ~uintptr_t{15};
  void** words = reinterpret_cast<void**>(top);
  *--words = nullptr;  // where a caller's return address would be: the stack is then aligned as after a call
  *--words = reinterpret_cast<void*>(&body);
  words -= 6;
  fiber.stack_pointer = words;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, reinterpret_cast<void (*)()>(&body), 0);
#endif
}

void wait_until_it_changes(const uint64_t& number) {
  Fiber& fiber = fibers[current];
  fiber.waits_for = &number, fiber.seen = number;
  leave();
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: block %lld, thread %d: %s\n", static_cast<long long>(current_block), current,
               what);
  std::abort();
}

void finish(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  }
}

void check_fence() {
  for (const char* at = shared() + shared_size; at < memory.data() + memory.size(); ++at)
    if (*at != kFenceByte) fail("a thread wrote behind the shared memory");
}

bool is_ready(const Fiber& fiber) {
  return !fiber.done && (fiber.waits_for == nullptr || *fiber.waits_for != fiber.seen);
}

bool can_go_on(int warp) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (is_ready(fibers[static_cast<size_t>(warp * kLanes + lane)])) return true;
  return false;
}

// Lets every thread of a warp that is ready go on to where it waits, from a random one on, forwards or backwards.
// Returns how many have come to their end.
int advance(int warp) {
  const int first = static_cast<int>(order() % kLanes), step = order() & 1 ? 1 : kLanes - 1;
  int ended = 0;
  for (int i = 0; i < kLanes && !trapped; ++i) {
    const int number = warp * kLanes + (first + i * step) % kLanes;
    Fiber& fiber = fibers[static_cast<size_t>(number)];
    if (!is_ready(fiber)) continue;
    fiber.waits_for = nullptr;
    enter(number);
    ended += fiber.done;
  }
  return ended;
}

void run_block() {
  std::memset(memory.data(), kFenceByte, memory.size());
  std::memset(shared(), 0xff, shared_size);  // NaN in every format
  at_barrier = 0;
  for (Meeting& warp : warps) warp.arrived = 0;
  for (Fiber& fiber : fibers) start(fiber);
  std::vector<int> ready;
  for (int left = num_threads; left > 0 && !trapped;) {
    ready.clear();
    for (int warp = 0; warp < num_threads / kLanes; ++warp)
      if (can_go_on(warp)) ready.push_back(warp);
    if (ready.empty()) fail("every thread waits for others: some are at another barrier, or have returned");
    // One warp at random, alone: for a few instructions, or up to where it waits for the others. It so gets as far
    // ahead of them, or stays as far behind, as barriers allow.
    const int warp = ready[order() % ready.size()];
    const int most = order() & 1 ? 1 + static_cast<int>(order() % 8) : kUntilItWaits;
    for (int i = 0; i < most && can_go_on(warp) && !trapped; ++i) left -= advance(warp);
  }
  check_fence();
}

}  // namespace

void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel) {
  if (threads % kLanes != 0) fail("the block is no whole number of warps");
  num_threads = threads, entry = &kernel, trapped = false;
  order.seed(order_seed);  // a launch goes the same way every time
  barriers_of.push_back(0);
  fibers.resize(static_cast<size_t>(threads));
  warps.resize(static_cast<size_t>(threads / kLanes));
  shared_size = static_cast<size_t>(shared_bytes);
  memory.resize(shared_size + 2 * kFence);
  for (current_block = 0; current_block < blocks && !trapped; ++current_block) run_block();
  if (trapped) throw std::runtime_error("a thread stopped the kernel");
}

int thread() { return current; }
int64_t block() { return current_block; }

char* shared() { return memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16; }

void set_schedule(uint32_t seed, int64_t without_barrier) {
  order_seed = seed, left_out = without_barrier;
  barriers_of.clear();
}

int64_t num_barriers(int launch) {
  return static_cast<size_t>(launch) < barriers_of.size() ? barriers_of[static_cast<size_t>(launch)] : 0;
}

void barrier() {
  Fiber& fiber = fibers[static_cast<size_t>(current)];
  const int64_t number = fiber.barriers++;
  barriers_of.back() = std::max(barriers_of.back(), fiber.barriers);
  if (number == left_out) return;
  if (++at_barrier == num_threads) {
    at_barrier = 0;
    ++barrier_number;
  } else {
    wait_until_it_changes(barrier_number);
  }
}

void meet(Together together, void* mine) {
  Meeting& warp = warps[current / kLanes];
  if (warp.arrived > 0 && warp.together != together) fail("lanes of one warp are in different instructions");
  warp.together = together;
  warp.lanes[current % kLanes] = mine;
  if (++warp.arrived == kLanes) {
    together(warp.lanes.data());
    warp.arrived = 0;
    ++warp.number;
  } else {
    wait_until_it_changes(warp.number);
  }
}

void check_shared_16(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("16 bytes of shared memory are not aligned");
  const char* begin = static_cast<const char*>(address);
  if (begin < shared() || begin + 16 > shared() + shared_size) fail("16 bytes miss the shared memory");
}

void copy_later(void* to, const void* from, int bytes) {
  check_shared_16(to);
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("a copy of 16 bytes is not aligned");
  fibers[static_cast<size_t>(current)].open.push_back({to, from, bytes});
}

void commit() {
  Fiber& fiber = fibers[current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait(int pending) {
  auto& groups = fibers[current].groups;
  while (groups.size() > static_cast<size_t>(pending < 0 ? 0 : pending)) {
    finish(groups.front());
    groups.erase(groups.begin());
  }
}

void too_much_shared_memory(int64_t bytes) {
  throw std::runtime_error("a launch asks for " + std::to_string(bytes) +
                           " bytes of shared memory: more than a block may have");
}

void trap() {
  trapped = true;
  fibers[current].done = true;
  leave();
  std::abort();
}

}  // namespace xeco::gpu::machine

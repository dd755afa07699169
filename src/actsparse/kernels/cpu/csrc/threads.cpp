// Tasks on torch's threads: one parallel region a call, or a team that serves many calls from one region.
#include <atomic>
#include <exception>
#include <memory>

#include "internal.h"

namespace actsparse {
namespace {

using ParallelFor = int32_t (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
using GetNumThreads = int32_t (*)(uint32_t*);
std::atomic<ParallelFor> parallel_for{nullptr};
std::atomic<GetNumThreads> get_num_threads{nullptr};

using Body = void (*)(void* context, int64_t task);

struct Tasks {
  Body body;
  void* context;
};

void run_range(int64_t begin, int64_t end, void* context) {
  const Tasks& t = *static_cast<const Tasks*>(context);
  for (int64_t i = begin; i < end; ++i) t.body(t.context, i);
}

// The members of a team wait in one region of torch's pool for what its leader, task 0, has to share. A call is one word,
// which number of call it is and how many tasks it has, so that a member sees both or neither. Every member has a place that
// says up to which call its task was taken, by itself or, where it does not come, by the leader: no call needs anybody but the
// leader to be there, and where torch runs the tasks one after another the leader does everything.
class Team {
 public:
  static constexpr int64_t most_tasks = 0xffff;  // of a call
  explicit Team(int64_t members) : members_(members), place_(new Place[size_t(members)]()) {}

  void run(int64_t tasks, Body body, void* context) {
    body_ = body;
    context_ = context;
    const uint64_t call = ++number_;
    __atomic_store_n(&call_, call << 16 | uint64_t(tasks), __ATOMIC_RELEASE);
    for (int64_t t = 0; t < tasks; t += members_) body(context, t);
    for (int64_t m = 1; m < members_ && m < tasks; ++m) {
      // A member that is awake begins within a microsecond.
      for (int64_t spins = 0; spins < patience && taken(m) < call; ++spins) rest(spins);
      if (take(m, call))
        work(m, tasks);
      else
        for (int64_t spins = 0; __atomic_load_n(&place_[m].done, __ATOMIC_ACQUIRE) < call; ++spins) rest(spins);
    }
  }

  void follow(int64_t member) {
    uint64_t seen = 0;
    for (int64_t spins = 0;; ++spins) {
      const uint64_t word = __atomic_load_n(&call_, __ATOMIC_ACQUIRE);
      if (word == closed) return;
      if (word == seen) {
        rest(spins);
        continue;
      }
      seen = word;
      spins = 0;
      const uint64_t call = word >> 16;
      const int64_t tasks = int64_t(word & uint64_t(most_tasks));
      if (member >= tasks || !take(member, call)) continue;
      work(member, tasks);
      __atomic_store_n(&place_[member].done, call, __ATOMIC_RELEASE);
    }
  }

  void close() { __atomic_store_n(&call_, closed, __ATOMIC_RELEASE); }

 private:
  static constexpr uint64_t closed = ~uint64_t(0);
  static constexpr int64_t patience = 64;
  struct alignas(128) Place {
    uint64_t taken, done;
    char apart[112];
  };

  uint64_t taken(int64_t member) const { return __atomic_load_n(&place_[member].taken, __ATOMIC_RELAXED); }

  bool take(int64_t member, uint64_t call) {
    uint64_t before = taken(member);
    return before < call && __atomic_compare_exchange_n(&place_[member].taken, &before, call, false, __ATOMIC_ACQUIRE,
                                                        __ATOMIC_RELAXED);
  }

  // After its place was taken: until the call ends its body and context stay.
  void work(int64_t member, int64_t tasks) const {
    for (int64_t t = member; t < tasks; t += members_) body_(context_, t);
  }

  const int64_t members_;
  const std::unique_ptr<Place[]> place_;
  uint64_t number_ = 0;
  Body body_ = nullptr;
  void* context_ = nullptr;
  alignas(128) uint64_t call_ = 0;
  char apart_[120];
};

// A team and what it was made for. Whoever is given task 0 leads, or, where that one does not come because the pool runs the
// tasks one after the other in another order, the first that has waited for it.
struct Region {
  Team team;
  Tasks led;
  bool taken;
  std::exception_ptr failed;
  void enter(int64_t task);
};

// Of the thread that leads one; none while it works on a task itself, because what a task starts is serial.
thread_local Team* leads = nullptr;

struct Leading {
  explicit Leading(Team* team) : before(leads) { leads = team; }
  ~Leading() { leads = before; }
  Team* const before;
};

void Region::enter(int64_t task) {
  constexpr int64_t patience = 5000;
  for (int64_t spins = 0; task && spins < patience && !__atomic_load_n(&taken, __ATOMIC_RELAXED); ++spins) rest(spins);
  if (__atomic_exchange_n(&taken, true, __ATOMIC_RELAXED)) {
    if (task) team.follow(task);
    return;
  }
  try {
    const Leading now(&team);
    led.body(led.context, 0);
  } catch (...) {  // nothing may be thrown through the pool
    failed = std::current_exception();
  }
  team.close();
}

}  // namespace

int64_t thread_count() {
  const GetNumThreads get = get_num_threads.load(std::memory_order_relaxed);
  uint32_t n = 1;
  return get && parallel_for.load(std::memory_order_relaxed) && get(&n) == 0 && n > 1 ? int64_t(n) : 1;
}

void run_tasks(int64_t tasks, Body body, void* context) {
  Tasks t{body, context};
  Team* const team = leads;
  if (tasks <= 1) return run_range(0, tasks, &t);
  if (team && tasks <= Team::most_tasks) {
    const Leading nothing(nullptr);
    return team->run(tasks, body, context);
  }
  const ParallelFor pool = parallel_for.load(std::memory_order_relaxed);
  if (!pool || pool(0, tasks, 1, run_range, &t) != 0) run_range(0, tasks, &t);
}

void lead_team(Body body, void* context) {
  const int64_t members = thread_count();
  if (members <= 1 || leads) return body(context, 0);
  Region region{Team(members), {body, context}, false, nullptr};
  Tasks tasks{[](void* c, int64_t task) { static_cast<Region*>(c)->enter(task); }, &region};
  const ParallelFor pool = parallel_for.load(std::memory_order_relaxed);
  if (pool(0, members, 1, run_range, &tasks) != 0 && !region.taken) region.enter(0);
  if (region.failed) std::rethrow_exception(region.failed);
}

}  // namespace actsparse

using namespace actsparse;

void as_set_threads(void* torch_parallel_for, void* torch_get_num_threads) {
  parallel_for.store(reinterpret_cast<ParallelFor>(torch_parallel_for));
  get_num_threads.store(reinterpret_cast<GetNumThreads>(torch_get_num_threads));
}

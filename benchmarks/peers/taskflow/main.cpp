// Empty dynamic tasks on Taskflow, the C++ counterpart of the Rust core's benchmark.
//
// usage: main WORKERS TASKS RUNS
//
// Prints one JSON object: Taskflow's version, and for each case the nanoseconds a task of every
// counted run. A run is timed from the first spawn until the executor has nothing left. The cases
// take turns, round after round, and the first round warms up.
//
//   inside      independent tasks, spawned by a task
//   outside     independent tasks, spawned by a thread that is no worker
//   dependent   tasks of a square grid whose handles are kept, each after its upper and its left
//               neighbour, spawned by a thread that is no worker

#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include <taskflow/taskflow.hpp>

namespace {

using Clock = std::chrono::steady_clock;

double nanoseconds_since(Clock::time_point start, std::size_t tasks) {
  const std::chrono::duration<double, std::nano> elapsed = Clock::now() - start;
  return elapsed.count() / static_cast<double>(tasks);
}

double inside(tf::Executor& executor, std::size_t tasks) {
  const auto start = Clock::now();
  executor.silent_async([&executor, tasks] {
    for (std::size_t index = 0; index < tasks; ++index) {
      executor.silent_async([] {});
    }
  });
  executor.wait_for_all();
  return nanoseconds_since(start, tasks);
}

double outside(tf::Executor& executor, std::size_t tasks) {
  const auto start = Clock::now();
  for (std::size_t index = 0; index < tasks; ++index) {
    executor.silent_async([] {});
  }
  executor.wait_for_all();
  return nanoseconds_since(start, tasks);
}

double dependent(tf::Executor& executor, std::size_t tasks) {
  const auto side = static_cast<std::size_t>(std::sqrt(static_cast<double>(tasks)));
  std::vector<tf::AsyncTask> grid;
  grid.reserve(side * side);
  const auto start = Clock::now();
  for (std::size_t row = 0; row < side; ++row) {
    for (std::size_t column = 0; column < side; ++column) {
      const std::size_t here = row * side + column;
      if (row > 0 && column > 0) {
        grid.push_back(
            executor.silent_dependent_async([] {}, grid[here - side], grid[here - 1]));
      } else if (row > 0) {
        grid.push_back(executor.silent_dependent_async([] {}, grid[here - side]));
      } else if (column > 0) {
        grid.push_back(executor.silent_dependent_async([] {}, grid[here - 1]));
      } else {
        grid.push_back(executor.silent_dependent_async([] {}));
      }
    }
  }
  executor.wait_for_all();
  return nanoseconds_since(start, side * side);
}

std::string version() {
#if defined(TF_MAJOR_VERSION) && defined(TF_MINOR_VERSION) && defined(TF_PATCH_VERSION)
  return std::to_string(TF_MAJOR_VERSION) + "." + std::to_string(TF_MINOR_VERSION) + "." +
         std::to_string(TF_PATCH_VERSION);
#else
  return "of unknown version";
#endif
}

}  // namespace

int main(int argc, char** argv) {
  const long workers = argc == 4 ? std::atol(argv[1]) : 0;
  const long tasks = argc == 4 ? std::atol(argv[2]) : 0;
  const long runs = argc == 4 ? std::atol(argv[3]) : 0;
  if (workers < 1 || tasks < 1 || runs < 1) {
    std::cerr << "usage: " << argv[0] << " WORKERS TASKS RUNS, each at least 1\n";
    return 2;
  }

  tf::Executor executor(static_cast<std::size_t>(workers));
  const auto count = static_cast<std::size_t>(tasks);
  std::map<std::string, std::vector<double>> times;
  for (long run = 0; run <= runs; ++run) {
    const double a = inside(executor, count);
    const double b = outside(executor, count);
    const double c = dependent(executor, count);
    if (run > 0) {
      times["inside"].push_back(a);
      times["outside"].push_back(b);
      times["dependent"].push_back(c);
    }
  }

  std::cout << "{\"version\": \"" << version() << "\"";
  for (const auto& [name, values] : times) {
    std::cout << ", \"" << name << "\": [";
    for (std::size_t index = 0; index < values.size(); ++index) {
      std::cout << (index > 0 ? ", " : "") << values[index];
    }
    std::cout << "]";
  }
  std::cout << "}\n";
  return 0;
}

/* Empty tasks on StarPU, the C counterpart of the Rust core's benchmark.
 *
 * usage: main WORKERS TASKS RUNS
 *
 * Prints one JSON object: StarPU's version, and for each case the nanoseconds a task of every counted
 * run. A run is timed from the first submission until nothing is left. The cases take turns, round
 * after round, and the first round warms up.
 *
 *   outside     independent tasks, submitted by a thread that is no worker
 *   dependent   tasks of a square grid that are kept, each after its upper and its left neighbour, by
 *               declared dependencies
 *   data        tasks that read what the one before wrote, and write: their order is inferred
 */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <starpu.h>

enum { CASES = 3 };
static const char *const names[CASES] = {"outside", "dependent", "data"};

static void nothing(void *buffers[], void *arguments) {
  (void)buffers;
  (void)arguments;
}

static struct starpu_codelet empty = {.cpu_funcs = {nothing}, .nbuffers = 0, .name = "empty"};
static struct starpu_codelet copies = {
    .cpu_funcs = {nothing}, .nbuffers = 2, .modes = {STARPU_R, STARPU_W}, .name = "copies"};

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return 1e9 * (double)time.tv_sec + (double)time.tv_nsec;
}

static void check(int status, const char *what) {
  if (status != 0) {
    fprintf(stderr, "%s: %d\n", what, status);
    exit(1);
  }
}

static double outside(size_t tasks) {
  const double start = now();
  for (size_t index = 0; index < tasks; ++index) {
    struct starpu_task *task = starpu_task_create();
    task->cl = &empty;
    check(starpu_task_submit(task), "starpu_task_submit");
  }
  starpu_task_wait_for_all();
  return (now() - start) / (double)tasks;
}

static double dependent(size_t tasks) {
  const size_t side = (size_t)sqrt((double)tasks);
  struct starpu_task **grid = malloc(side * side * sizeof *grid);
  if (grid == NULL) {
    check(-1, "malloc");
  }
  const double start = now();
  for (size_t here = 0; here < side * side; ++here) {
    struct starpu_task *task = starpu_task_create();
    struct starpu_task *before[2];
    unsigned count = 0;
    task->cl = &empty;
    task->destroy = 0; /* It is named by those after it. */
    grid[here] = task;
    if (here >= side) {
      before[count++] = grid[here - side];
    }
    if (here % side != 0) {
      before[count++] = grid[here - 1];
    }
    if (count > 0) {
      starpu_task_declare_deps_array(task, count, before);
    }
    check(starpu_task_submit(task), "starpu_task_submit");
  }
  starpu_task_wait_for_all();
  const double elapsed = now() - start;
  for (size_t here = 0; here < side * side; ++here) {
    starpu_task_destroy(grid[here]);
  }
  free(grid);
  return elapsed / (double)(side * side);
}

static double data(size_t tasks) {
  int64_t values[2] = {0, 0};
  starpu_data_handle_t handles[2];
  for (int index = 0; index < 2; ++index) {
    starpu_variable_data_register(&handles[index], STARPU_MAIN_RAM, (uintptr_t)&values[index],
                                  sizeof values[index]);
  }
  const double start = now();
  for (size_t index = 0; index < tasks; ++index) {
    struct starpu_task *task = starpu_task_create();
    task->cl = &copies;
    task->handles[0] = handles[index % 2];
    task->handles[1] = handles[(index + 1) % 2];
    check(starpu_task_submit(task), "starpu_task_submit");
  }
  starpu_task_wait_for_all();
  const double elapsed = now() - start;
  starpu_data_unregister(handles[0]);
  starpu_data_unregister(handles[1]);
  return elapsed / (double)tasks;
}

int main(int argc, char **argv) {
  const long workers = argc == 4 ? atol(argv[1]) : 0;
  const long tasks = argc == 4 ? atol(argv[2]) : 0;
  const long runs = argc == 4 ? atol(argv[3]) : 0;
  if (workers < 1 || tasks < 1 || runs < 1) {
    fprintf(stderr, "usage: %s WORKERS TASKS RUNS, each at least 1\n", argv[0]);
    return 2;
  }

  struct starpu_conf conf;
  check(starpu_conf_init(&conf), "starpu_conf_init");
  conf.ncpus = (int)workers;
  conf.ncuda = 0;
  conf.nopencl = 0;
  check(starpu_init(&conf), "starpu_init");

  double (*const cases[CASES])(size_t) = {outside, dependent, data};
  double *times[CASES];
  for (int which = 0; which < CASES; ++which) {
    times[which] = malloc((size_t)runs * sizeof *times[which]);
    if (times[which] == NULL) {
      check(-1, "malloc");
    }
  }
  for (long run = 0; run <= runs; ++run) {
    for (int which = 0; which < CASES; ++which) {
      const double time = cases[which]((size_t)tasks);
      if (run > 0) {
        times[which][run - 1] = time;
      }
    }
  }
  starpu_shutdown();

  printf("{\"version\": \"%d.%d.%d\"", STARPU_MAJOR_VERSION, STARPU_MINOR_VERSION,
         STARPU_RELEASE_VERSION);
  for (int which = 0; which < CASES; ++which) {
    printf(", \"%s\": [", names[which]);
    for (long run = 0; run < runs; ++run) {
      printf("%s%.3f", run > 0 ? ", " : "", times[which][run]);
    }
    printf("]");
    free(times[which]);
  }
  printf("}\n");
  return 0;
}

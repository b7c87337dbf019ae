// Grids that both sides use in turn: the device copies the generation, the CPU computes the next.
#include <cstdint>
#include <iostream>
#include <usvm.hpp>
#include <vector>

namespace {

constexpr std::size_t WIDTH = 1024, HEIGHT = 1024;
using Grid = std::vector<std::uint8_t, usvm::allocator<std::uint8_t>>;

// The next generation of a few rows; a row's neighbours wrap around.
void step(const Grid &from, Grid &to, std::size_t first, std::size_t rows) {
    for (std::size_t y = first; y < first + rows; y++)
        for (std::size_t x = 0; x < WIDTH; x++) {
            int sum = 0;
            for (std::size_t dy : {HEIGHT - 1, std::size_t(0), std::size_t(1)})
                for (std::size_t dx : {WIDTH - 1, std::size_t(0), std::size_t(1)})
                    if (dy || dx)
                        sum += from[(y + dy) % HEIGHT * WIDTH + (x + dx) % WIDTH];
            to[y * WIDTH + x] = sum == 3 || (sum == 2 && from[y * WIDTH + x]);
        }
}

Grid play(usvm_space_t space, int generations, bool on_device) {
    Grid now(WIDTH * HEIGHT), next(WIDTH * HEIGHT);
    for (std::size_t x : {1, 2, 3})
        now[2 * WIDTH + x] = 1; // a glider
    now[1 * WIDTH + 3] = now[0 * WIDTH + 2] = 1;
    for (int g = 0; g < generations; g++) {
        if (on_device)
            usvm::check(usvm_copy(space, next.data(), now.data(), now.size()));
        else
            next = now;
        step(now, next, 0, 40); // only where something lives
        std::swap(now, next);
    }
    return now;
}

} // namespace

int main() try {
    usvm::check(usvm_init(nullptr));
    usvm_device_t device;
    usvm_space_t space;
    usvm::check(usvm_device_get(0, &device));
    usvm::check(usvm_space_create(device, nullptr, &space));

    const Grid want = play(space, 12, false);
    const Grid got = play(space, 12, true);

    usvm_stats_t stats;
    stats.size = sizeof stats;
    usvm::check(usvm_stats_get(space, &stats));
    std::cout << "12 generations of 1 MiB: " << (stats.bytes_to_device >> 10) << " KiB to the device, "
              << (stats.bytes_to_host >> 10) << " KiB back, " << stats.cpu_faults << " CPU faults\n";
    usvm::check(usvm_space_destroy(space));
    usvm::check(usvm_shutdown());
    std::cout << (got == want ? "verified" : "wrong") << "\n";
    return got != want;
} catch (const std::exception &e) {
    std::cerr << e.what() << "\n";
    return 1;
}

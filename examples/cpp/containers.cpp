// Standard containers with usvm.hpp, filled by the device and read by the CPU.
#include <cstdint>
#include <iostream>
#include <memory_resource>
#include <numeric>
#include <string>
#include <unordered_map>
#include <usvm.hpp>
#include <vector>

int main() try {
    usvm::check(usvm_init(nullptr));
    usvm_device_t device;
    usvm_space_t space;
    usvm::check(usvm_device_get(0, &device));
    usvm::check(usvm_space_create(device, nullptr, &space));

    bool good = true;
    {
        std::pmr::vector<std::uint8_t> numbers(8 << 20, usvm::resource());
        usvm::check(usvm_fill(space, numbers.data(), 3, numbers.size()));
        good &= std::accumulate(numbers.begin(), numbers.end(), 0ull) == 3ull * numbers.size();

        std::pmr::unordered_map<std::pmr::string, int> words(usvm::resource());
        for (const char *word : {"any", "malloc", "pointer", "works", "any", "pointer", "any"})
            ++words[word];
        good &= words["any"] == 3 && words["works"] == 1;

        std::vector<double, usvm::allocator<double>> source(1 << 19, 0.5), target(1 << 19);
        usvm::check(usvm_copy(space, target.data(), source.data(), source.size() * sizeof(double)));
        good &= target == source;
    }
    try {
        usvm::check(usvm_evict(space, nullptr, 4096));
    } catch (const usvm::error &e) {
        std::cout << "as it should be: " << e.what() << "\n";
    }

    usvm::check(usvm_space_destroy(space));
    usvm::check(usvm_shutdown());
    std::cout << (good ? "verified" : "wrong") << "\n";
    return !good;
} catch (const std::exception &e) {
    std::cerr << e.what() << "\n";
    return 1;
}

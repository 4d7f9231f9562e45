// A plain Metropolis simulation of the fluid, as a student would write it:
// metropolis GAMMA SYSTEMS SWEEPS SEED
// prints energy, mean height and acceptance of each system, a line each
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

struct Particle { double x, y; };

const int N = 30;
const double L = 10, T = 0.75, STEP = 0.2, CUTOFF = 3;

double pair(const Particle &a, const Particle &b) {
    double dx = a.x - b.x, dy = a.y - b.y, r2 = dx * dx + dy * dy;
    if (r2 > CUTOFF * CUTOFF) return 0;
    double s = 1 / (r2 * r2 * r2);
    return 4 * (s * s - s);
}

double energy(const std::vector<Particle> &p, int i, const Particle &at, double gamma) {
    double e = gamma * at.y;
    for (int j = 0; j < N; j++)
        if (j != i) e += pair(at, p[j]);
    return e;
}

int main(int argc, char **argv) {
    double gamma = atof(argv[1]);
    int systems = atoi(argv[2]), sweeps = atoi(argv[3]);
    std::mt19937 generator(atoi(argv[4]));
    std::uniform_real_distribution<double> uniform(0, 1);
    for (int s = 0; s < systems; s++) {
        std::vector<Particle> p(N);
        for (auto &q : p) q = {L * uniform(generator), L * uniform(generator)};
        long accepted = 0;
        for (int sweep = 0; sweep < sweeps; sweep++)
            for (int i = 0; i < N; i++) {
                Particle q = {p[i].x + STEP * (2 * uniform(generator) - 1),
                              p[i].y + STEP * (2 * uniform(generator) - 1)};
                if (q.x <= 0 || q.x >= L) q.x = p[i].x;
                if (q.y <= 0 || q.y >= L) q.y = p[i].y;
                double change = energy(p, i, q, gamma) - energy(p, i, p[i], gamma);
                if (uniform(generator) < exp(-change / T)) { p[i] = q; accepted++; }
            }
        double total = 0, height = 0;
        for (int i = 0; i < N; i++) {
            total += gamma * p[i].y;
            height += p[i].y / N;
            for (int j = 0; j < i; j++) total += pair(p[i], p[j]);
        }
        printf("%.6f %.6f %.6f\n", total, height, double(accepted) / N / sweeps);
    }
}
